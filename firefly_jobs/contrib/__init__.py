"""What is not needed by everybody: job types that are ready to use, a bridge to Celery.

Nothing of the package imports these modules.  What needs a library says so when it is
imported, with the extra that brings it.
"""
