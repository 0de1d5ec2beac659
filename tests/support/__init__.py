"""What the tests stand on: processes, servers, a proxy that loses answers, and patience."""
