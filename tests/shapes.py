"""The run-time checker of shapes and types that the import hook puts on every function of torchgraft in tests."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
