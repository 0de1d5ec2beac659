"""Execute claims: call the function, settle what it touched, report the outcome."""
