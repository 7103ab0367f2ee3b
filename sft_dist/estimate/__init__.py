"""What a run will need, from its recipe and the architecture's config alone: memory by part, time, cost, strategy.

    recipe --architecture.read--> Architecture --tuning.tuned--> Tuned
    (Tuned, Layout) --memory.phases--> bytes of each part in each phase of a step; the fullest one is the peak
    compare.estimate: every strategy on these devices, the one to take with its reason, and what would fit

No weights are read, nothing is built, and neither torch nor transformers is imported.
"""
