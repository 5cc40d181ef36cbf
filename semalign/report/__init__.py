"""Tables and figures from recorded runs; no numbers are made here."""
