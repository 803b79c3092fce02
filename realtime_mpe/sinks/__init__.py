"""Where notes go. Each sink is a module of its own, imported only when it is chosen."""
