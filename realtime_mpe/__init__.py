"""Live multi-instrument multi-pitch estimation: which notes sound, and which player plays each, as MIDI."""
