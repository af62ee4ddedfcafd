"""Several recipes on one task, trained alike: what each costs, and what pays where.

Nothing is imported here: a worker has to choose how threads wait before torch is loaded.
"""
