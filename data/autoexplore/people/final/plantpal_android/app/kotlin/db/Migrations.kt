package pal.db

// 3 to 4: litres became millilitres, old values times 1000
val M34 = object : Migration(3, 4) {
    override fun migrate(db: SupportSQLiteDatabase) {
        db.execSQL("UPDATE plant SET water = water * 1000")
    }
}

// 4 to 5: photo path
val M45 = object : Migration(4, 5) {
    override fun migrate(db: SupportSQLiteDatabase) {
        db.execSQL("ALTER TABLE plant ADD COLUMN photo TEXT")
    }
}
