"""From a FASTA file to packed training batches.

``prepare`` writes a corpus once; ``mapping``, ``clusters`` and ``holdout`` say which proteins are one sample, and which
are not trained on. ``index`` opens it; ``plan`` says which letters sample number n is; ``samples`` reads and masks
them; ``source`` streams them through Ray Data; ``pack`` lays them end to end. Only ``source`` and ``prepare`` know Ray.
"""
