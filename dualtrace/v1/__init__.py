"""Generated from protos/dualtrace/v1 by `make protos`; never edited. It knows nothing else of this package."""
