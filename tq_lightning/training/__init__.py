"""The Lightning module, its losses and schedules, and the Lightning command line."""
