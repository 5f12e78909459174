import pg from "pg";

const pool = new pg.Pool({ max: 12 });

export async function findOrder(id) {
  const { rows } = await pool.query("select * from orders where id = $1", [id]);
  return rows[0];
}

export async function setState(id, state) {
  await pool.query("update orders set state = $2 where id = $1", [id, state]);
}
