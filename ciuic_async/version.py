"""The version of this package."""

__version__ = "0.1.0"
ENGINE = f"ciuic_async/{__version__}"
