"""The operations that dominate the models' run time, one folder each, in plain PyTorch.

`reference.py` is the readable definition that every faster form is tested against; the maths is in the folder's README.
This package knows torch only: no model, no configuration, no Ray.
"""
