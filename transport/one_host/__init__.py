"""The transport between processes of one user on one host: Unix sockets and shared memory."""
