"""Clients as programs: each answers a job in a process of its own (`protocol`)."""
