package pal.db

@Dao
interface PlantDao {
    // archived plants never come back from here
    @Query("SELECT * FROM plant WHERE archived = 0 ORDER BY name")
    suspend fun all(): List<Plant>

    @Query("SELECT * FROM plant WHERE archived = 0 AND nextDay <= :day")
    suspend fun due(day: Long): List<Plant>

    @Insert
    suspend fun add(plant: Plant)
}
