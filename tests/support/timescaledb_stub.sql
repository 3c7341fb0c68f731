-- Stands in for the extension timescaledb, of which `BarStore` uses one function. Its arguments, their order, and what it
-- refuses with which words are those of TimescaleDB 2.23. It makes no chunks: it only remembers the tables.
CREATE TABLE public.stub_hypertables (relation regclass PRIMARY KEY, time_column name NOT NULL);

CREATE FUNCTION public.create_hypertable(
  relation regclass,
  time_column_name name,
  partitioning_column name DEFAULT NULL,
  number_partitions integer DEFAULT NULL,
  associated_schema_name name DEFAULT NULL,
  associated_table_prefix name DEFAULT NULL,
  chunk_time_interval anyelement DEFAULT NULL::bigint,
  create_default_indexes boolean DEFAULT true,
  if_not_exists boolean DEFAULT false,
  partitioning_func regproc DEFAULT NULL,
  migrate_data boolean DEFAULT false,
  OUT hypertable_id integer,
  OUT schema_name name,
  OUT table_name name,
  OUT created boolean
) LANGUAGE plpgsql AS $$
DECLARE
  has_rows boolean;
BEGIN
  hypertable_id := 1;
  schema_name := 'public';
  table_name := relation::text;
  created := NOT EXISTS (SELECT 1 FROM public.stub_hypertables known WHERE known.relation = create_hypertable.relation);
  IF NOT created THEN
    IF NOT if_not_exists THEN
      RAISE EXCEPTION 'table "%" is already a hypertable', relation;
    END IF;
    RETURN;
  END IF;
  EXECUTE format('SELECT EXISTS (SELECT 1 FROM %s)', relation) INTO has_rows;
  IF has_rows AND NOT migrate_data THEN
    RAISE EXCEPTION 'table "%" is not empty', relation;
  END IF;
  IF EXISTS (
    SELECT 1 FROM pg_index
    WHERE indrelid = relation AND indisunique AND NOT EXISTS (
      SELECT 1 FROM pg_attribute
      WHERE attrelid = relation AND attname = time_column_name AND attnum = ANY (indkey::smallint[])
    )
  ) THEN
    RAISE EXCEPTION 'cannot create a unique index without the column "%" (used in partitioning)', time_column_name;
  END IF;
  INSERT INTO public.stub_hypertables VALUES (relation, time_column_name);
END;
$$;
