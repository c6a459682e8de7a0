"""Data: preparation of the embedded tree crowns, checks of COCO annotations, a data set class that runs them.

Importing this package, `tree_crowns` or `checks` loads neither torch nor MMDetection; `coco` does.
"""
