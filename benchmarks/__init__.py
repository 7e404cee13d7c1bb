"""Experiments too long for CI. Each prints its table and writes JSON; docs/log.md quotes them with their commands."""
