"""Which slots every layer may see in a decode step, and how many it may keep."""
