"""The app that the examples of the documentation belong to; its ``tasks`` are on the pages."""
