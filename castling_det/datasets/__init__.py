"""Data: checks of COCO annotations, images and configs, and a data set class that runs them.

Importing this package or its checks loads neither torch nor MMDetection; `coco` does.
"""
