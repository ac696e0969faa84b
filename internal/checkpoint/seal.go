package checkpoint

import (
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"sync"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/crypto/chacha20poly1305"
)

const (
	keySize   = 32
	keyIDSize = 8
)

type chunkID [sha256.Size]byte

// cryptor names chunks, compresses, and encrypts if there is a key. Its zero key
// means none.
type cryptor struct {
	aead  cipher.AEAD // nil without a key
	name  []byte      // key of chunk ids
	keyID [keyIDSize]byte
}

// newCryptor derives what is needed from the key, so that no value is used twice:
// ids of chunks tell nothing of content to who has no key.
func newCryptor(key []byte) (*cryptor, error) {
	if key == nil {
		return &cryptor{}, nil
	}
	if len(key) != keySize {
		return nil, fmt.Errorf("%w: it has %d bytes, not %d", ErrKey, len(key), keySize)
	}
	derive := func(use string, n int) []byte {
		out, err := hkdf.Key(sha256.New, key, nil, "cloudcode checkpoint v1 "+use, n)
		if err != nil {
			panic(err) // only for absurd lengths
		}
		return out
	}
	c := &cryptor{name: derive("chunk id", 32)}
	copy(c.keyID[:], derive("key id", keyIDSize))
	var err error
	c.aead, err = chacha20poly1305.NewX(derive("seal", chacha20poly1305.KeySize))
	return c, err
}

func (c *cryptor) encrypted() bool { return c.aead != nil }

// id of a chunk: SHA-256 of the content, with a key HMAC-SHA-256.
func (c *cryptor) id(plain []byte) chunkID {
	if c.name == nil {
		return sha256.Sum256(plain)
	}
	h := hmac.New(sha256.New, c.name)
	h.Write(plain)
	return chunkID(h.Sum(nil))
}

// Compression of a sealed text, its first byte.
const (
	methodRaw  = 0
	methodZstd = 1
)

// seal compresses and, with a key, encrypts plain. what says where the result
// stands: it opens only there.
func (c *cryptor) seal(what string, context, plain []byte) []byte {
	overhead := 0
	if c.aead != nil {
		overhead = chacha20poly1305.NonceSizeX
	}
	out := make([]byte, overhead+1, overhead+1+len(plain)+chacha20poly1305.Overhead)
	out[overhead] = methodZstd
	enc := encoders.Get().(*zstd.Encoder)
	out = enc.EncodeAll(plain, out)
	encoders.Put(enc)
	if len(out)-overhead-1 >= len(plain)-len(plain)/32 {
		out = append(out[:overhead], methodRaw)
		out = append(out, plain...)
	}
	if c.aead == nil {
		return out
	}
	nonce := out[:overhead]
	rand.Read(nonce)
	return c.aead.Seal(nonce, nonce, out[overhead:], associated(what, context))
}

// open is the inverse of seal; the plain text must have exactly n bytes, or if n
// is negative at most -n.
func (c *cryptor) open(what string, context, sealed []byte, n int) ([]byte, error) {
	if c.aead != nil {
		if len(sealed) < chacha20poly1305.NonceSizeX {
			return nil, fmt.Errorf("%w: too short", ErrDamaged)
		}
		nonce, text := sealed[:chacha20poly1305.NonceSizeX], sealed[chacha20poly1305.NonceSizeX:]
		var err error
		if sealed, err = c.aead.Open(nil, nonce, text, associated(what, context)); err != nil {
			return nil, fmt.Errorf("%w: it does not decrypt", ErrDamaged)
		}
	}
	if len(sealed) == 0 {
		return nil, fmt.Errorf("%w: empty", ErrDamaged)
	}
	method, text := sealed[0], sealed[1:]
	switch method {
	case methodRaw:
	case methodZstd:
		var err error
		if text, err = inflate(text, max(n, -n)); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
		}
	default:
		return nil, fmt.Errorf("%w: unknown compression %d", ErrDamaged, method)
	}
	if n >= 0 && len(text) != n || len(text) > max(n, -n) {
		return nil, fmt.Errorf("%w: %d bytes, not %d", ErrDamaged, len(text), n)
	}
	return text, nil
}

func associated(what string, context []byte) []byte {
	return append(append([]byte("cloudcode checkpoint v1\x00"+what), 0), context...)
}

// Encoders are costly to make and hold a window each.
var encoders = sync.Pool{New: func() any {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderCRC(false), zstd.WithWindowSize(1<<20), zstd.WithSingleSegment(true))
	if err != nil {
		panic(err)
	}
	return e
}}

var decoders = sync.Pool{New: func() any {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxManifest))
	if err != nil {
		panic(err)
	}
	return d
}}

// inflate allocates limit bytes at most, and only as many as the frame says.
func inflate(text []byte, limit int) ([]byte, error) {
	var h zstd.Header
	if err := h.Decode(text); err != nil {
		return nil, err
	}
	if !h.HasFCS || h.FrameContentSize > uint64(limit) || h.Skippable {
		return nil, fmt.Errorf("it inflates to %d bytes, more than the %d allowed", h.FrameContentSize, limit)
	}
	d := decoders.Get().(*zstd.Decoder)
	defer decoders.Put(d)
	out, err := d.DecodeAll(text, make([]byte, 0, min(int(h.FrameContentSize), 64<<10+256*len(text))))
	if err == nil && len(out) > limit {
		err = fmt.Errorf("it inflates to more than the %d bytes allowed", limit)
	}
	return out, err
}
