CREATE TABLE ticket (
  code char(10) PRIMARY KEY,
  event int NOT NULL,
  used_at timestamptz
);
