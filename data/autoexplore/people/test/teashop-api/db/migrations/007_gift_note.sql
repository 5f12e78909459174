-- A greeting that is printed on a card, at most 180 characters: more does not fit.
alter table orders add column gift_note varchar(180);
alter table orders add column gift_wrap boolean not null default false;
update orders set gift_wrap = true where comment like '%wrap%';
create index orders_gift on orders (gift_wrap) where gift_wrap;
