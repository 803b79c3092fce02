"""Everything that makes and measures models; needs the ``[train]`` extra. The runtime never imports it."""
