// Walks a chain's log with the Go project's own packages: x/mod/sumdb/note checks signatures, x/mod/sumdb/tlog checks
// tiles and proofs. What to walk comes as JSON on standard input; exit status 1 and a line say what is refused.
package main

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

type proof struct {
	Index int64
	Old   int64
	Size  int64
	Path  [][]byte
}

type task struct {
	Log         string
	Vkey        string
	Witnesses   []string
	Heads       []string // notes of earlier sizes
	Inclusion   []proof  // made by the package under test
	Consistency []proof
}

func main() {
	var given task
	check(json.NewDecoder(os.Stdin).Decode(&given))
	verifier, err := note.NewVerifier(given.Vkey)
	check(err)
	verifiers := []note.Verifier{verifier}
	for _, vkey := range given.Witnesses {
		verifiers = append(verifiers, newWitness(vkey))
	}
	data, err := os.ReadFile(filepath.Join(given.Log, "checkpoint"))
	check(err)
	newest := open(data, verifiers)
	trees := map[int64]tlog.Hash{newest.N: newest.Hash}
	for _, head := range given.Heads {
		tree := open([]byte(head), verifiers[:1])
		trees[tree.N] = tree.Hash
	}

	// The reader checks every tile that it hands out against the head.
	reader := tlog.TileHashReader(newest, tiles{given.Log})
	var hashes []tlog.Hash
	for start := int64(0); start < newest.N; start += 256 {
		width := newest.N - start
		if width > 256 {
			width = 256
		}
		for offset, entry := range entries(given.Log, start/256, int(width)) {
			hashes = append(hashes, tlog.RecordHash(entry))
			found, err := reader.ReadHashes([]int64{tlog.StoredHashIndex(0, start+int64(offset))})
			check(err)
			if found[0] != hashes[len(hashes)-1] {
				fail("entry %d is not what its tile says", start+int64(offset))
			}
		}
	}

	// Its own proofs, from our tiles.
	for size, root := range trees {
		consistent, err := tlog.ProveTree(newest.N, size, reader)
		check(err)
		check(tlog.CheckTree(consistent, newest.N, newest.Hash, size, root))
	}
	for _, index := range []int64{0, newest.N / 2, newest.N - 1} {
		included, err := tlog.ProveRecord(newest.N, index, reader)
		check(err)
		check(tlog.CheckRecord(included, newest.N, newest.Hash, index, hashes[index]))
	}
	// Our proofs, by its check.
	for _, ours := range given.Inclusion {
		check(tlog.CheckRecord(convert(ours.Path), ours.Size, trees[ours.Size], ours.Index, hashes[ours.Index]))
	}
	for _, ours := range given.Consistency {
		check(tlog.CheckTree(convert(ours.Path), ours.Size, trees[ours.Size], ours.Old, trees[ours.Old]))
	}
	fmt.Printf("ok %d entries %d heads %d proofs\n", len(hashes), len(trees), len(given.Inclusion)+len(given.Consistency))
}

// open checks a log head; every verifier must have signed it.
func open(data []byte, verifiers []note.Verifier) tlog.Tree {
	opened, err := note.Open(data, note.VerifierList(verifiers...))
	check(err)
	if len(opened.Sigs) != len(verifiers) {
		fail("%d of %d expected signatures", len(opened.Sigs), len(verifiers))
	}
	lines := strings.Split(opened.Text, "\n")
	if len(lines) != 4 || lines[0] != verifiers[0].Name() || lines[3] != "" {
		fail("%q is no log head", opened.Text)
	}
	// Go's own tree notes begin with another line; the rest is the same.
	tree, err := tlog.ParseTree([]byte("go.sum database tree\n" + strings.Join(lines[1:3], "\n") + "\n"))
	check(err)
	return tree
}

// tiles reads C2SP tlog-tiles, whose names have no height.
type tiles struct{ log string }

func (t tiles) Height() int { return 8 }

func (t tiles) ReadTiles(wanted []tlog.Tile) ([][]byte, error) {
	var all [][]byte
	for _, tile := range wanted {
		data := read(t.log, fmt.Sprint(tile.L), tile.N, tile.W)
		all = append(all, data[:tile.W*tlog.HashSize])
	}
	return all, nil
}

func (t tiles) SaveTiles([]tlog.Tile, [][]byte) {}

func entries(log string, index int64, width int) [][]byte {
	data := read(log, "entries", index, width)
	var all [][]byte
	for len(data) > 0 && len(all) < width {
		end := 2 + int(binary.BigEndian.Uint16(data))
		all = append(all, data[2:end])
		data = data[end:]
	}
	if len(all) != width {
		fail("bundle %d has %d entries", index, len(all))
	}
	return all
}

// read gives a tile or bundle: the partial file or, where that was deleted, the full one.
func read(log, level string, index int64, width int) []byte {
	path := fmt.Sprintf("%03d", index%1000)
	for index >= 1000 {
		index /= 1000
		path = fmt.Sprintf("x%03d/%s", index%1000, path)
	}
	path = filepath.Join(log, "tile", level, path)
	if width < 256 {
		if data, err := os.ReadFile(fmt.Sprintf("%s.p/%d", path, width)); err == nil {
			return data
		}
	}
	data, err := os.ReadFile(path)
	check(err)
	return data
}

// witness verifies cosignatures (C2SP tlog-cosignature), which x/mod does not know.
type witness struct {
	name string
	hash uint32
	key  ed25519.PublicKey
}

func newWitness(vkey string) note.Verifier {
	parts := strings.SplitN(vkey, "+", 3)
	material, err := base64.StdEncoding.DecodeString(parts[2])
	check(err)
	sum := sha256.Sum256(append([]byte(parts[0]+"\n"), material...))
	if hex.EncodeToString(sum[:4]) != parts[1] || material[0] != 4 || len(material) != 33 {
		fail("%q is no key of a witness", vkey)
	}
	return witness{parts[0], binary.BigEndian.Uint32(sum[:4]), material[1:]}
}

func (w witness) Name() string    { return w.name }
func (w witness) KeyHash() uint32 { return w.hash }
func (w witness) Verify(text, signature []byte) bool {
	if len(signature) != 8+ed25519.SignatureSize {
		return false
	}
	signed := fmt.Sprintf("cosignature/v1\ntime %d\n%s", binary.BigEndian.Uint64(signature), text)
	return ed25519.Verify(w.key, []byte(signed), signature[8:])
}

func convert(path [][]byte) []tlog.Hash {
	hashes := make([]tlog.Hash, len(path))
	for number, hash := range path {
		copy(hashes[number][:], hash)
	}
	return hashes
}

func check(err error) {
	if err != nil {
		fail("%v", err)
	}
}

func fail(format string, values ...any) {
	fmt.Printf("refused: "+format+"\n", values...)
	os.Exit(1)
}
