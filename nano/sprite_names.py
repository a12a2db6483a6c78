"""Everyday names for the emoji that show a thing: which are used, what each is called, and what it may be mistaken for.

Each category lists entries `label > name / plural`, separated by `;`. The label is the Unicode English short name; the
name defaults to the label, the plural to the regular one. Several labels may share a name: drawings of one thing.
"""

from dataclasses import dataclass

_NAMES: dict[str, str] = {
    "animal": """
        monkey; monkey face > monkey; gorilla; orangutan; dog; dog face > dog; guide dog > dog; service dog >
        dog; poodle; wolf / wolves; fox; raccoon; cat; cat face > cat; black cat > cat; lion; tiger; tiger face
        > tiger; leopard; horse; horse face > horse; moose / moose; donkey; unicorn; zebra; deer / deer; bison /
        bison; cow; cow face > cow; ox / oxen; water buffalo > buffalo / buffaloes; pig; pig face > pig; boar;
        ram; ewe > sheep / sheep; goat; camel; two-hump camel > camel; llama; giraffe; elephant; mammoth;
        rhinoceros > rhino; hippopotamus > hippo; mouse / mice; mouse face > mouse / mice; rat; hamster; rabbit;
        rabbit face > rabbit; chipmunk; beaver; hedgehog; bat; bear; polar bear; koala; panda; sloth; otter;
        skunk; kangaroo; badger; turkey; chicken; rooster; hatching chick > chick; baby chick > chick;
        front-facing baby chick > chick; bird; black bird > bird; penguin; dove; eagle; duck; swan; owl;
        flamingo; peacock; parrot; goose / geese; frog; crocodile; turtle; lizard; snake; dragon; dragon face >
        dragon; sauropod > dinosaur; T-Rex > dinosaur; spouting whale > whale; whale; dolphin; orca; seal; fish
        / fish; tropical fish > fish / fish; blowfish > pufferfish / pufferfish; shark; octopus; jellyfish /
        jellyfish; crab; lobster; shrimp / shrimp; squid / squid; oyster; snail; butterfly; bug > caterpillar;
        ant; honeybee > bee; beetle; lady beetle > ladybug; cricket; cockroach; spider; scorpion; mosquito /
        mosquitoes; fly; worm
    """,
    "plant": """
        bouquet; cherry blossom > flower; hibiscus > flower; blossom > flower; lotus > lotus flower; rose;
        sunflower; tulip; seedling; potted plant; evergreen tree > pine tree; deciduous tree > tree; leafless
        tree > tree; palm tree; cactus / cacti; shamrock > clover; four leaf clover > clover; maple leaf / maple
        leaves; fallen leaf > leaf / leaves; leaf fluttering in wind > leaf / leaves; mushroom; brown mushroom >
        mushroom
    """,
    "fruit": """
        grapes > bunch of grapes / bunches of grapes; melon; watermelon; tangerine; lemon; lime; banana;
        pineapple; mango / mangoes; red apple > apple; green apple > apple; pear; peach; cherries > pair of
        cherries / pairs of cherries; strawberry; kiwi fruit > kiwi; coconut
    """,
    "vegetable": """
        eggplant; potato / potatoes; carrot; ear of corn / ears of corn; hot pepper > chili pepper; bell pepper;
        cucumber; broccoli > head of broccoli / heads of broccoli; garlic > bulb of garlic / bulbs of garlic;
        onion; pea pod
    """,
    "food": """
        tomato / tomatoes; avocado; chestnut; bread > loaf of bread / loaves of bread; croissant; baguette bread
        > baguette; pretzel; bagel; pancakes > stack of pancakes / stacks of pancakes; waffle; cheese wedge >
        piece of cheese / pieces of cheese; poultry leg > chicken leg; hamburger; french fries > box of fries /
        boxes of fries; pizza > slice of pizza / slices of pizza; hot dog; sandwich; taco; burrito; egg; popcorn
        > box of popcorn / boxes of popcorn; rice ball; cooked rice > bowl of rice / bowls of rice; steaming
        bowl > bowl of noodles / bowls of noodles; spaghetti > plate of spaghetti / plates of spaghetti; sushi >
        piece of sushi / pieces of sushi; dumpling; fortune cookie; soft ice cream > ice cream cone; ice cream >
        bowl of ice cream / bowls of ice cream; doughnut > donut; cookie; birthday cake > cake; shortcake >
        piece of cake / pieces of cake; cupcake; pie; chocolate bar; candy; lollipop; honey pot; green salad >
        salad; glass of milk / glasses of milk; hot beverage > cup of coffee / cups of coffee; teacup without
        handle > cup of tea / cups of tea; tropical drink > cocktail; cocktail glass > cocktail; wine glass >
        glass of wine / glasses of wine; beer mug; beverage box > juice box; ice > ice cube
    """,
    "vehicle": """
        locomotive > train; high-speed train > train; bullet train > train; train; metro > train; light rail >
        train; tram; tram car > tram; bus; oncoming bus > bus; trolleybus > bus; ambulance; fire engine > fire
        truck; police car; oncoming police car > police car; taxi; oncoming taxi > taxi; automobile > car;
        oncoming automobile > car; sport utility vehicle > car; pickup truck; delivery truck > truck;
        articulated lorry > truck; tractor; racing car > race car; motorcycle; motor scooter > scooter; kick
        scooter > scooter; auto rickshaw > rickshaw; bicycle; skateboard; sailboat; canoe; speedboat > boat;
        motor boat > boat; passenger ship > ship; ship; ferry; airplane; small airplane > airplane; helicopter;
        rocket; flying saucer; aerial tramway > cable car; mountain cableway > cable car
    """,
    "building": """
        hut; house; house with garden > house; office building > building; hospital; school; hotel; factory;
        castle; Japanese castle > castle; church; mosque; stadium; Tokyo tower > tower
    """,
    "shape": """
        star; glowing star > star; red heart > heart; pink heart > heart; orange heart > heart; yellow heart >
        heart; green heart > heart; blue heart > heart; light blue heart > heart; purple heart > heart; brown
        heart > heart; black heart > heart; grey heart > heart; white heart > heart; red circle > circle; orange
        circle > circle; yellow circle > circle; green circle > circle; blue circle > circle; purple circle >
        circle; brown circle > circle; black circle > circle; white circle > circle; red square > square; orange
        square > square; yellow square > square; green square > square; blue square > square; purple square >
        square; brown square > square; black large square > square; white large square > square; large orange
        diamond > diamond; large blue diamond > diamond
    """,
    "object": """
        spiral shell > shell; empty nest > nest; baby bottle; teapot; bottle with popping cork > bottle; tumbler
        glass > glass; chopsticks > pair of chopsticks / pairs of chopsticks; spoon; kitchen knife > knife /
        knives; jar; amphora > vase; cooking > frying pan; shallow pan of food > frying pan; pot of food > pot;
        bowl with spoon > bowl; globe showing Europe-Africa > globe; globe showing Americas > globe; globe
        showing Asia-Australia > globe; globe with meridians > globe; world map > map; compass; snow-capped
        mountain > mountain; mountain; mount fuji > mountain; volcano / volcanoes; tent; desert island > island;
        brick; rock; wood > log; Statue of Liberty > statue; fountain; playground slide > slide; ferris wheel;
        roller coaster; circus tent; manual wheelchair > wheelchair; motorized wheelchair > wheelchair; roller
        skate; wheel; fuel pump > gas pump; oil drum > barrel; horizontal traffic light > traffic light;
        vertical traffic light > traffic light; stop sign; anchor; ring buoy > lifebuoy; parachute; satellite;
        bellhop bell > bell; bell; luggage > suitcase; hourglass done > hourglass; hourglass not done >
        hourglass; watch; alarm clock; stopwatch; mantelpiece clock > clock; three o\u2019clock > clock; ten
        o\u2019clock > clock; crescent moon > moon; full moon > moon; full moon face > moon; first quarter moon
        face > moon; last quarter moon face > moon; sun; sun with face > sun; ringed planet > planet; cloud;
        cloud with rain > rain cloud; high voltage > lightning bolt; tornado / tornadoes; rainbow; umbrella;
        umbrella with rain drops > umbrella; closed umbrella > umbrella; umbrella on ground > umbrella;
        snowflake; snowman / snowmen; snowman without snow > snowman / snowmen; comet; fire > flame; droplet >
        drop of water / drops of water; water wave > wave; thermometer; jack-o-lantern > pumpkin; Christmas tree
        > christmas tree; balloon; wrapped gift > gift; ribbon; admission tickets > ticket; ticket; firecracker;
        military medal > medal; sports medal > medal; 1st place medal > medal; 2nd place medal > medal; 3rd
        place medal > medal; trophy; soccer ball; baseball; basketball; volleyball; american football >
        football; flying disc > frisbee; ping pong > ping pong paddle; boxing glove; ice skate; fishing pole >
        fishing rod; skis > pair of skis / pairs of skis; sled; bullseye > target; yo-yo; kite; pool 8 ball >
        billiard ball; crystal ball; magic wand; video game > game controller; joystick; slot machine; game die
        > die / dice; puzzle piece; teddy bear; mirror ball > disco ball; chess pawn > chess piece; framed
        picture > painting; artist palette > palette; thread > spool of thread / spools of thread; sewing needle
        > needle; yarn > ball of yarn / balls of yarn; glasses > pair of glasses / pairs of glasses; sunglasses
        > pair of sunglasses / pairs of sunglasses; goggles > pair of goggles / pairs of goggles; lab coat;
        safety vest > vest; necktie > tie; t-shirt; jeans > pair of jeans / pairs of jeans; scarf / scarves;
        gloves > pair of gloves / pairs of gloves; coat; socks > pair of socks / pairs of socks; dress; kimono;
        one-piece swimsuit > swimsuit; shorts > pair of shorts / pairs of shorts; bikini; folding hand fan >
        fan; purse; handbag; backpack; thong sandal > flip-flop; man\u2019s shoe > shoe; running shoe > sneaker;
        hiking boot > boot; woman\u2019s boot > boot; high-heeled shoe > high heel; woman\u2019s sandal >
        sandal; crown; woman\u2019s hat > hat; top hat; graduation cap; billed cap > cap; military helmet >
        helmet; rescue worker\u2019s helmet > helmet; lipstick; ring > diamond ring; gem stone > gem; hair pick
        > comb; speaker low volume > speaker; speaker medium volume > speaker; speaker high volume > speaker;
        megaphone; musical note; studio microphone > microphone; microphone; headphone > pair of headphones /
        pairs of headphones; radio; saxophone; trumpet; trombone; accordion; guitar; musical keyboard > piano;
        violin; banjo; drum; flute; harp; mobile phone > phone; telephone; battery; electric plug > plug;
        laptop; desktop computer > computer; printer; keyboard; computer mouse / computer mice; floppy disk;
        optical disk > disc; abacus / abacuses; movie camera; camera; camera with flash > camera; video camera;
        television; magnifying glass tilted left > magnifying glass; magnifying glass tilted right > magnifying
        glass; candle; light bulb; flashlight; red paper lantern > lantern; closed book > book; open book >
        book; green book > book; blue book > book; orange book > book; books > stack of books / stacks of books;
        notebook; notebook with decorative cover > notebook; scroll; newspaper; coin; money bag; treasure chest;
        credit card; envelope; package > box; closed mailbox with raised flag > mailbox; closed mailbox with
        lowered flag > mailbox; open mailbox with raised flag > mailbox; open mailbox with lowered flag >
        mailbox; postbox > mailbox; pencil; fountain pen > pen; pen; paintbrush; crayon; briefcase; file folder
        > folder; open file folder > folder; calendar; tear-off calendar > calendar; clipboard; pushpin; round
        pushpin > pushpin; paperclip; straight ruler > ruler; scissors > pair of scissors / pairs of scissors;
        wastebasket > trash can; file cabinet; locked > lock; unlocked > lock; key; old key > key; hammer; axe;
        pick > pickaxe; dagger; bomb; boomerang; shield; carpentry saw > saw; wrench; screwdriver; gear; clamp;
        balance scale > scale; chains > chain; hook; toolbox; magnet; ladder; shovel; test tube; microscope;
        telescope; satellite antenna > satellite dish; syringe; pill; adhesive bandage > bandage; crutch;
        stethoscope; door; mirror; window; bed; couch and lamp > couch; chair; toilet; plunger; shower; bathtub;
        mouse trap > mousetrap; razor; safety pin; broom; basket; roll of paper > roll of paper / rolls of
        paper; bucket; soap > bar of soap / bars of soap; toothbrush; sponge; fire extinguisher; shopping cart;
        robot; ghost; alien; skull; tooth / teeth; bone
    """,
}

_NEAR = (
    "bird penguin dove eagle duck swan owl flamingo peacock parrot goose chicken rooster turkey chick",
    "fish pufferfish shark whale dolphin orca seal",
    "dog poodle wolf fox",
    "cat lion tiger leopard",
    "bear polar_bear panda koala teddy_bear",
    "horse donkey zebra unicorn",
    "cow ox bison buffalo",
    "sheep ram goat llama",
    "pig boar",
    "mouse rat hamster",
    "deer moose",
    "monkey gorilla orangutan",
    "elephant mammoth",
    "lizard crocodile dinosaur dragon",
    "beetle ladybug ant cockroach cricket bee fly mosquito",
    "worm caterpillar snake",
    "shrimp lobster crab",
    "octopus squid jellyfish",
    "beaver otter badger chipmunk raccoon hedgehog skunk",
    "flower rose tulip sunflower lotus_flower bouquet",
    "tree pine_tree palm_tree christmas_tree seedling potted_plant",
    "leaf maple_leaf clover seedling",
    "tangerine peach apple",
    "lemon lime",
    "melon watermelon",
    "tomato apple",
    "car taxi police_car race_car pickup_truck truck bus ambulance fire_truck tram train",
    "boat ship ferry sailboat canoe",
    "motorcycle scooter bicycle rickshaw",
    "building house hut hospital school hotel factory castle church mosque tower stadium",
    "tent circus_tent",
    "clock watch alarm_clock stopwatch",
    "book notebook stack_of_books",
    "hat top_hat cap graduation_cap helmet crown",
    "shoe sneaker boot high_heel sandal flip-flop",
    "purse handbag backpack briefcase suitcase",
    "coat lab_coat vest kimono dress t-shirt",
    "swimsuit bikini",
    "camera movie_camera video_camera",
    "phone telephone",
    "computer laptop television",
    "pen pencil crayon paintbrush",
    "cake cupcake piece_of_cake pie",
    "ice_cream_cone bowl_of_ice_cream",
    "cup_of_coffee cup_of_tea",
    "glass cocktail glass_of_wine glass_of_milk beer_mug",
    "bowl bowl_of_rice bowl_of_noodles bowl_of_ice_cream salad pot frying_pan",
    "bottle baby_bottle jar vase",
    "loaf_of_bread baguette bagel croissant",
    "donut bagel",
    "cookie fortune_cookie",
    "candy lollipop",
    "guitar banjo violin",
    "trumpet trombone saxophone",
    "cloud rain_cloud tornado",
    "snowflake star",
    "moon planet globe crescent",
    "pair_of_glasses pair_of_sunglasses pair_of_goggles",
    "knife dagger",
    "medal coin",
    "bone skull",
    "bucket trash_can basket pot",
    "microphone speaker megaphone",
    "hammer axe pickaxe",
    "soccer_ball volleyball baseball basketball billiard_ball crystal_ball disco_ball",
    "gem diamond diamond_ring",
    "donut ring lifebuoy wheel",
    "envelope mailbox",
    "chair couch",
    "gift box",
    "flying_saucer alien",
)


@dataclass(frozen=True)
class SpriteName:
    """What an emoji is called: name, plural and category of thing."""

    kind: str
    plural: str
    category: str


def regular_plural(noun: str) -> str:
    """The regular English plural of a noun."""
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"


def _parse(category: str, entry: str) -> tuple[str, SpriteName]:
    entry, _, plural = (part.strip() for part in entry.partition(" / "))
    label, _, kind = (part.strip() for part in entry.partition(" > "))
    kind = kind or label
    return label, SpriteName(kind, plural or regular_plural(kind), category)


SPRITE_NAMES: dict[str, SpriteName] = dict(
    _parse(category, " ".join(entry.split())) for category, text in _NAMES.items() for entry in text.split(";")
)
"""Unicode label to everyday name."""

NEAR_NAMES: tuple[frozenset[str], ...] = tuple(
    frozenset(word.replace("_", " ") for word in group.split()) for group in _NEAR
)
"""Things that are easily taken for, or called by the name of, one another."""

_COMMON = """
    dog cat bird fish horse cow pig sheep rabbit duck chicken frog bear lion elephant mouse butterfly
    bee flower tree apple banana strawberry lemon pear carrot pizza cake cookie egg hamburger car bus
    train truck bicycle boat ship airplane house church castle ball sun moon star cloud umbrella rainbow
    snowman balloon gift clock book pencil key chair bed door cup_of_coffee hat shoe crown guitar phone
    camera television computer heart circle square diamond bell
"""

ALWAYS_TRAINED = frozenset(word.replace("_", " ") for word in _COMMON.split())
"""Names so common that they are never kept from training, whatever their code point."""
