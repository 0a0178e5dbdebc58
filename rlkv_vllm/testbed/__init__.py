"""The embedded reasoner: its weights and how they are trained."""
