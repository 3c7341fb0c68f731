"""Who may call what: TLS, callers' identities and roles, rates, and an account of what was refused."""
