"""The decision of every KV head in a decode step."""
