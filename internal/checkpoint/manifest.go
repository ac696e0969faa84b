package checkpoint

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"time"
)

// A manifest object is
//
//	magic, 1 byte flags, 8 bytes key id
//	4 bytes number of packs, their ids of 16 bytes each
//	4 bytes length of the body, body: sealed JSON
//	SHA-256 of all before
//
// Numbers are little endian. The packs are outside the body so that garbage
// collection needs no key.
const (
	manifestMagic   = "ccmanif1"
	manifestVersion = 1
	maxManifest     = 64 << 20
	maxPacks        = 1 << 20
	maxNotes        = 50
	maxNote         = 1 << 10
)

// Meta is what the caller says of a checkpoint.
type Meta struct {
	Trigger         string // why it was made: see Policy for those that are kept longer
	OpenCodeVersion string
	SessionJSON     []byte // record of the session, as protojson
	Mode            string
	Restored        string // generation/id of the checkpoint this tree was restored from
}

// Info describes a checkpoint.
type Info struct {
	ID   string
	Time time.Time
	Meta
	Generation    uint64
	Node          string
	Files         int64 // entries of any kind
	Bytes         int64 // of files, without holes
	UploadedBytes int64
	Notes         []string // what is not in it, in words
	Parent        string
	// Unchanged: Save found nothing new; this is the checkpoint there was.
	Unchanged bool
}

// Manifest is a checkpoint's own object.
type Manifest struct {
	Info
	Owner Owner

	session  string // escaped prefix
	segments []*chunk
	packs    []*pack
	cat      *catalog
}

type manifestJSON struct {
	Version       int           `json:"version"`
	ID            string        `json:"id"`
	Session       string        `json:"session"`
	Time          time.Time     `json:"time"`
	Parent        string        `json:"parent,omitempty"`
	Owner         ownerJSON     `json:"owner"`
	Trigger       string        `json:"trigger,omitempty"`
	OpenCode      string        `json:"opencode_version,omitempty"`
	Record        []byte        `json:"session_record,omitempty"`
	Mode          string        `json:"mode,omitempty"`
	Restored      string        `json:"restored,omitempty"`
	Files         int64         `json:"files"`
	Bytes         int64         `json:"bytes"`
	UploadedBytes int64         `json:"uploaded_bytes"`
	Notes         []string      `json:"notes,omitempty"`
	Packs         []packJSON    `json:"packs"`    // as before the body
	Segments      []segmentJSON `json:"segments"` // in the order of their entries
}

type packJSON struct {
	Size  int64 `json:"size"`  // of its blocks
	Plain int64 `json:"plain"` // … uncompressed
}

type segmentJSON struct {
	ID     string `json:"id"`
	Pack   int    `json:"pack"`
	Block  int64  `json:"block"` // offset in the pack
	Stored uint32 `json:"stored"`
	Plain  uint32 `json:"plain"`
	Offset uint32 `json:"offset"` // in the block's plain text
	Length uint32 `json:"length"`
}

type ownerJSON struct {
	SessionID  string `json:"session_id,omitempty"`
	SessionUID string `json:"session_uid,omitempty"`
	Node       string `json:"node,omitempty"`
	Instance   string `json:"instance,omitempty"`
	Generation uint64 `json:"generation"`
}

var (
	manifestID = regexp.MustCompile(`^[0-9]{8}t[0-9]{6}\.[0-9]{3}z-[a-z2-7]{4,16}$`)
	idFormat   = "20060102t150405.000z"
	idSuffix   = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)
)

// newManifestID is later than all that came before it, whatever the clock says.
func newManifestID(now time.Time, after string) (string, time.Time) {
	now = now.UTC().Truncate(time.Millisecond)
	if t, err := idTime(after); err == nil && !now.After(t) {
		now = t.Add(time.Millisecond)
	}
	var b [5]byte
	rand.Read(b[:])
	return now.Format(idFormat) + "-" + idSuffix.EncodeToString(b[:]), now
}

func idTime(id string) (time.Time, error) {
	t, _, _ := strings.Cut(id, "-")
	return time.Parse(idFormat, t)
}

func (m *Manifest) aad(head []byte) []byte {
	return append([]byte(m.session+"/"+m.ID+"\x00"), head...)
}

func (c *cryptor) encodeManifest(m *Manifest) ([]byte, error) {
	j := manifestJSON{
		Version: manifestVersion, ID: m.ID, Session: m.session, Time: m.Time, Parent: m.Parent, Owner: ownerJSON(m.Owner),
		Trigger: m.Trigger, OpenCode: m.OpenCodeVersion, Record: m.SessionJSON, Mode: m.Mode, Restored: m.Restored,
		Files: m.Files, Bytes: m.Bytes, UploadedBytes: m.UploadedBytes, Notes: m.Notes,
		Packs: []packJSON{}, Segments: []segmentJSON{},
	}
	index := map[*pack]int{}
	head := append([]byte(manifestMagic), c.flags())
	head = append(head, c.keyID[:]...)
	head = binary.LittleEndian.AppendUint32(head, uint32(len(m.packs)))
	for i, p := range m.packs {
		index[p] = i
		head = append(head, p.id[:]...)
		j.Packs = append(j.Packs, packJSON{Size: p.size, Plain: p.plain})
	}
	for _, s := range m.segments {
		i, ok := index[s.blk.pack]
		if !ok {
			return nil, errors.New("a segment is in a pack that the manifest does not name")
		}
		j.Segments = append(j.Segments, segmentJSON{
			ID: hex.EncodeToString(s.id[:]), Pack: i, Block: s.blk.off, Stored: s.blk.stored, Plain: s.blk.plain, Offset: s.off, Length: s.n,
		})
	}
	plain, err := json.Marshal(j)
	if err != nil {
		return nil, err
	}
	if len(plain) > maxManifest {
		return nil, fmt.Errorf("a manifest of %d bytes: the tree has too many files", len(plain))
	}
	body := c.seal("manifest", m.aad(head), plain)
	out := binary.LittleEndian.AppendUint32(head, uint32(len(body)))
	out = append(out, body...)
	sum := sha256.Sum256(out)
	return append(out, sum[:]...), nil
}

// manifestPacks reads what is outside the body; no key is needed.
func manifestPacks(text []byte) (head []byte, packs []packID, body []byte, err error) {
	const fixed = len(manifestMagic) + 1 + keyIDSize + 4
	if len(text) < fixed+4+sha256.Size || string(text[:len(manifestMagic)]) != manifestMagic {
		return nil, nil, nil, fmt.Errorf("%w: it is no manifest", ErrDamaged)
	}
	rest, sum := text[:len(text)-sha256.Size], text[len(text)-sha256.Size:]
	if got := sha256.Sum256(rest); !bytes.Equal(got[:], sum) {
		return nil, nil, nil, fmt.Errorf("%w: wrong checksum", ErrDamaged)
	}
	n := int(binary.LittleEndian.Uint32(rest[fixed-4:]))
	if n > maxPacks || len(rest) < fixed+16*n+4 {
		return nil, nil, nil, fmt.Errorf("%w: it names %d packs and is too short for that", ErrDamaged, n)
	}
	for i := range n {
		packs = append(packs, packID(rest[fixed+16*i:][:16]))
	}
	head, body = rest[:fixed+16*n], rest[fixed+16*n+4:]
	if int(binary.LittleEndian.Uint32(rest[fixed+16*n:])) != len(body) {
		return nil, nil, nil, fmt.Errorf("%w: its body has another length", ErrDamaged)
	}
	return head, packs, body, nil
}

// decodeManifest reads the manifest that is id of session.
func (c *cryptor) decodeManifest(session, id string, text []byte) (*Manifest, error) {
	head, packs, body, err := manifestPacks(text)
	if err != nil {
		return nil, err
	}
	if err := c.checkKey(head[len(manifestMagic)], head[len(manifestMagic)+1:][:keyIDSize]); err != nil {
		return nil, err
	}
	return c.decodeBody(session, id, head, packs, body)
}

func (c *cryptor) decodeBody(session, id string, head []byte, packs []packID, body []byte) (*Manifest, error) {
	m := &Manifest{session: session, Info: Info{ID: id}, cat: newCatalog()}
	plain, err := c.open("manifest", m.aad(head), body, -maxManifest)
	if err != nil {
		return nil, err
	}
	d := json.NewDecoder(bytes.NewReader(plain))
	d.DisallowUnknownFields()
	var version struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(plain, &version); err == nil && version.Version > manifestVersion {
		return nil, fmt.Errorf("%w: version %d is not known here: use a newer cloudcode", ErrDamaged, version.Version)
	}
	// An object in it has some fields; empty ones cost far more memory than text. The
	// notes may have names full of braces.
	if n := bytes.Count(plain, []byte("{")); n > len(plain)/24+(maxNotes+1)*2*maxNote {
		return nil, fmt.Errorf("%w: too many objects", ErrDamaged)
	}
	var j manifestJSON
	if err := d.Decode(&j); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: text behind its end", ErrDamaged)
	}
	if err := m.fill(&j, packs); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return m, nil
}

func (m *Manifest) fill(j *manifestJSON, packs []packID) error {
	switch {
	case j.Version != manifestVersion:
		return fmt.Errorf("version %d", j.Version)
	case j.ID != m.ID || j.Session != m.session:
		return fmt.Errorf("it is %s of %s", j.ID, j.Session)
	case len(j.Packs) != len(packs):
		return fmt.Errorf("%d packs, not %d", len(j.Packs), len(packs))
	case j.Files < 0 || j.Files > maxEntries || j.Bytes < 0 || j.UploadedBytes < 0 || j.Owner.Generation > maxGeneration:
		return errors.New("numbers that cannot be")
	case len(j.Notes) > maxNotes+1:
		return fmt.Errorf("%d notes", len(j.Notes))
	}
	for i, n := range j.Notes {
		j.Notes[i] = clipNote(n)
	}
	m.Info = Info{
		ID: j.ID, Time: j.Time, Generation: j.Owner.Generation, Node: j.Owner.Node, Files: j.Files, Bytes: j.Bytes,
		UploadedBytes: j.UploadedBytes, Notes: j.Notes, Parent: j.Parent,
		Meta: Meta{Trigger: j.Trigger, OpenCodeVersion: j.OpenCode, SessionJSON: j.Record, Mode: j.Mode, Restored: j.Restored},
	}
	m.Owner = Owner(j.Owner)
	for i, p := range j.Packs {
		if p.Size < 0 || p.Plain < 0 {
			return errors.New("negative numbers")
		}
		if m.cat.packs[packs[i]] != nil {
			return fmt.Errorf("pack %s twice", packs[i])
		}
		k := &pack{id: packs[i], size: p.Size, plain: p.Plain}
		m.cat.packs[k.id] = k
		m.packs = append(m.packs, k)
	}
	m.cat.closed = true
	seen := map[chunkID]bool{}
	for _, s := range j.Segments {
		id, err := hex.DecodeString(s.ID)
		if err != nil || len(id) != len(chunkID{}) || s.Pack < 0 || s.Pack >= len(m.packs) || s.Length == 0 ||
			s.Length > maxSegment || s.Plain > maxBlock || uint64(s.Offset)+uint64(s.Length) > uint64(s.Plain) ||
			s.Stored > maxPack || s.Block < int64(packHeader) || s.Block > maxPack {
			return errors.New("a segment that cannot be")
		}
		if seen[chunkID(id)] {
			return errors.New("a segment twice")
		}
		seen[chunkID(id)] = true
		b, err := m.cat.block(m.packs[s.Pack], s.Block, s.Stored, s.Plain)
		if err != nil {
			return err
		}
		b.kind = kindMeta
		m.segments = append(m.segments, &chunk{id: chunkID(id), blk: b, off: s.Offset, n: s.Length})
	}
	if len(m.segments) == 0 {
		return errors.New("it has no entries")
	}
	return nil
}
