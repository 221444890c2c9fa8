"""Search outside this process: databases that hold the vectors, and the service that answers over HTTP."""
