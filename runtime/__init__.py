"""The runtime: carries out the schedule that the simulator prices, with real streams, threads, memory and files.

Needs torch; nothing outside this package may import it at import time.
"""
