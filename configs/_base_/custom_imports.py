# In every config of this package: importing it registers it, so a clone on PYTHONPATH works without an installation.
custom_imports = dict(imports=["castling_det"], allow_failed_imports=False)
