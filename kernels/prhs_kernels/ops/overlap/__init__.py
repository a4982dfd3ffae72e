"""Starting a kernel while the one before it still runs."""
