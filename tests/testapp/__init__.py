"""An app of the tests' own: effects that show doubles, constraints that wait for COMMIT."""
