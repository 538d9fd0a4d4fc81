"""Random faults during real launches; see ``python -m tests.campaigns --help``."""
