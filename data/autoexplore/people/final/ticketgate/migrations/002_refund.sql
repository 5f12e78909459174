-- refunds come from billing as a nightly file, not live
ALTER TABLE ticket ADD COLUMN refunded boolean DEFAULT false;
CREATE INDEX ticket_event ON ticket (event);

-- applied by hand in production, table is small enough
UPDATE ticket SET refunded = false WHERE refunded IS NULL;
