"""Methods that SemAlign is compared with."""
