"""Entry of the shipping process; the decision server starts it."""

from server.audit.shipping.shipping_process import main

if __name__ == "__main__":
    main()
