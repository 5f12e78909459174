package pal.db

@Entity
data class Plant(
    @PrimaryKey(autoGenerate = true) val id: Long = 0,
    val name: String,
    // millilitres
    val water: Int,
    val everyDays: Int,
    val nextDay: Long,
    val dormant: Boolean = false,
    val archived: Boolean = false,
    val photo: String? = null,
)
