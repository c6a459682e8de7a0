"""Running on MMDetection as it is installed: `host` checks which one that is, the others stand in for MMCV's operators.

`host` needs the standard library only; the stand-ins load with `mmcv.ops`.
"""
