"""Who may call what: TLS, callers' identities and roles, rates, and a record of what was refused."""
