"""The bodies that clients send, checked and typed. The engine never sees these."""
