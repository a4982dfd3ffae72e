"""The gated activation of the MLP."""
