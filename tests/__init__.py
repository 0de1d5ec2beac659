"""The tests.  ``python -m tests`` runs them on every database that answers."""
