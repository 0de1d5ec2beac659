"""A small project that uses firefly_jobs: demo, source of the docs, target of the tests."""
