"""The run-time type checker of the tests: beartype, with a whole number good where a float is."""

from beartype import BeartypeConf, beartype

typecheck = beartype(conf=BeartypeConf(is_pep484_tower=True))
