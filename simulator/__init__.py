"""Prices a schedule on a machine: fluid sharing, steady state, memory over time, bounds and limits."""
