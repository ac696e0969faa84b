package objstore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// Config of a bucket that Open takes.
type Config struct {
	Endpoint        string // http[s]://host[:port]
	Bucket          string
	AccessKeyID     string
	SecretAccessKey string
	Region          string // empty or "auto": asked for when it is needed
	PathStyle       bool   // see UsesPathStyle
	Timeouts        Timeouts
}

// Timeouts of one request; zero is the default.
type Timeouts struct {
	Dial   time.Duration // to connect, and again for TLS; 5 s
	Header time.Duration // from the last byte sent to the answer's first; 15 s
	Stall  time.Duration // without a byte of content moving; 15 s
	Retry  time.Duration // the first pause before a request is sent again; 100 ms
}

const (
	regionAuto = "auto"
	// regionDefault signs where nobody knows a region: AWS's first, which servers
	// that have none take.
	regionDefault = "us-east-1"

	// attempts of one request, begun within retryFor.
	attempts = 4
	retryFor = 10 * time.Second
	// deleteBatch is S3's limit of one request.
	deleteBatch = 1000
	maxKey      = 1024
)

// UsesPathStyle says whether the bucket goes into the path rather than the host
// name: where it is asked for, and where a host name cannot have it.
func (c Config) UsesPathStyle() bool {
	u, err := url.Parse(c.Endpoint)
	if c.PathStyle || err != nil {
		return true
	}
	host := u.Hostname()
	return net.ParseIP(host) != nil || !strings.Contains(strings.TrimSuffix(host, "."), ".") ||
		u.Scheme == "https" && strings.Contains(c.Bucket, ".") // certificates for *.host do not cover a.b.host
}

type s3 struct {
	cfg       Config
	transport *transport
	auto      bool // the region is the store's to tell

	// resolving holds the client, once its region is known. A channel and not a
	// mutex, so that waiting for it ends with the context.
	resolving chan *client
}

type client struct {
	minio.Core
	region string
}

var _ interface {
	Store
	io.Closer
} = (*s3)(nil)

// Open returns a bucket of an S3 server. It asks the server nothing yet.
func Open(c Config) (Store, error) { return open(c) }

func open(c Config) (*s3, error) {
	u, err := url.Parse(c.Endpoint)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("%w: endpoint %q is no http or https address", ErrUnsupported, c.Endpoint)
	}
	if c.Timeouts.Dial == 0 {
		c.Timeouts.Dial = 5 * time.Second
	}
	if c.Timeouts.Header == 0 {
		c.Timeouts.Header = 15 * time.Second
	}
	if c.Timeouts.Stall == 0 {
		c.Timeouts.Stall = 15 * time.Second
	}
	if c.Timeouts.Retry == 0 {
		c.Timeouts.Retry = 100 * time.Millisecond
	}
	s := &s3{cfg: c, transport: newTransport(c.Timeouts, isTigris(u.Hostname())), resolving: make(chan *client, 1)}
	region := c.Region
	switch {
	case region != "" && region != regionAuto:
	case isTigris(u.Hostname()) || hasSuffix(u.Hostname(), ".r2.cloudflarestorage.com"):
		region = regionAuto // it is their region's name
	default:
		s.auto, region = true, ""
	}
	var cl *client
	if region != "" {
		if cl, err = s.newClient(region); err != nil {
			return nil, err
		}
	}
	s.resolving <- cl
	return s, nil
}

func isTigris(host string) bool {
	return hasSuffix(host, ".tigris.dev") || hasSuffix(host, ".storage.dev")
}

func hasSuffix(host, suffix string) bool {
	return strings.HasSuffix(strings.TrimSuffix(strings.ToLower(host), "."), suffix)
}

func (s *s3) newClient(region string) (*client, error) {
	u, err := url.Parse(s.cfg.Endpoint)
	if err != nil {
		return nil, err
	}
	lookup := minio.BucketLookupDNS
	if s.cfg.UsesPathStyle() {
		lookup = minio.BucketLookupPath
	}
	core, err := minio.NewCore(u.Host, &minio.Options{
		Creds:        credentials.NewStaticV4(s.cfg.AccessKeyID, s.cfg.SecretAccessKey, ""),
		Secure:       u.Scheme == "https",
		Transport:    s.transport,
		Region:       region,
		BucketLookup: lookup,
		// Only this package knows what may be sent again: minio would repeat a
		// conditional Put whose first attempt was done and whose answer was lost.
		MaxRetries: 1,
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrUnsupported, s.cfg.Endpoint, err)
	}
	core.SetAppInfo("cloudcode", "1")
	return &client{Core: *core, region: region}, nil
}

// Close implements io.Closer.
func (s *s3) Close() error {
	s.transport.base.CloseIdleConnections()
	return nil
}

// connect returns the client, after it has found the region.
func (s *s3) connect(ctx context.Context) (*client, error) {
	var c *client
	select {
	case c = <-s.resolving:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { s.resolving <- c }()
	if c != nil {
		return c, nil
	}
	probe, err := s.newClient("")
	if err != nil {
		return nil, err
	}
	region, err := probe.GetBucketLocation(ctx, s.cfg.Bucket)
	if f := s.classify(OpList, "", err); err != nil {
		if errors.Is(f.err, ErrUnavailable) || errors.Is(f.err, ErrNoBucket) || errors.As(err, new(*notS3Error)) {
			return nil, err
		}
		// A server that does not tell. If this is not it either, its answer to the
		// request itself will say more.
		region = f.region
	}
	if region == "" {
		region = regionDefault
	}
	made, err := s.newClient(region)
	if err != nil {
		return nil, err
	}
	c = made
	return c, nil
}

// relocate makes later requests use another region, unless somebody did so already.
func (s *s3) relocate(ctx context.Context, from *client, region string) error {
	select {
	case c := <-s.resolving:
		if c == from {
			made, err := s.newClient(region)
			if err != nil {
				s.resolving <- c
				return err
			}
			c = made
		}
		s.resolving <- c
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// do runs one operation, again and again where that may help. A request whose
// outcome is unknown is repeated only if it is idempotent. fn may set progress, which
// makes it a new start.
func (s *s3) do(ctx context.Context, op, key string, idempotent bool, fn func(c *client, progress *bool) error) error {
	start := time.Now()
	moved := false
	for attempt := 1; ; attempt++ {
		progress := false
		c, err := s.connect(ctx)
		sent := err == nil
		if sent {
			err = fn(c, &progress)
		}
		if err == nil {
			return nil
		}
		if e := ctx.Err(); e != nil {
			return contextError(op+" "+key, e)
		}
		f := s.classify(op, key, err)
		if s.auto && sent && !moved && f.region != "" && f.region != c.region {
			if err := s.relocate(ctx, c, f.region); err != nil {
				return f.err
			}
			moved = true
			attempt = 0
			continue
		}
		if errors.Is(f.err, ErrUnavailable) {
			// The others are likely to lead nowhere as well.
			s.transport.base.CloseIdleConnections()
		}
		if progress {
			start, attempt = time.Now(), 1
		}
		if f.retry == never || f.retry == ifIdempotent && !idempotent && sent ||
			attempt >= attempts || time.Since(start) > retryFor {
			return f.err
		}
		pause := s.cfg.Timeouts.Retry << (2 * (attempt - 1)) // 0.1, 0.4, 1.6 s
		t := time.NewTimer(pause/2 + rand.N(pause/2+1))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return contextError(op+" "+key, ctx.Err())
		}
	}
}

func checkKey(op, key string) error {
	if key == "" || len(key) > maxKey {
		return fmt.Errorf("%w: %s of a key of %d bytes", ErrUnsupported, op, len(key))
	}
	return nil
}

// Get implements Store.
func (s *s3) Get(ctx context.Context, key string) ([]byte, Object, error) {
	return s.getUpTo(ctx, key, MaxObject)
}

func (s *s3) getUpTo(ctx context.Context, key string, limit int64) ([]byte, Object, error) {
	if err := checkKey(OpGet, key); err != nil {
		return nil, Object{}, err
	}
	var data []byte
	var o Object
	var large error
	err := s.do(ctx, OpGet, key, true, func(c *client, _ *bool) error {
		body, info, _, err := c.GetObject(ctx, s.cfg.Bucket, key, minio.GetObjectOptions{})
		if err != nil {
			return err
		}
		defer body.Close()
		o = object(info)
		o.Key = key
		if info.Size > limit {
			large = tooLarge(key, info.Size, limit)
			return nil
		}
		if data, err = readAll(body, info.Size, limit); int64(len(data)) > limit {
			large = tooLarge(key, int64(len(data)), limit)
		}
		return err
	})
	if err == nil {
		err = large
	}
	if err != nil {
		return nil, Object{}, err
	}
	return data, o, nil
}

// readAll reads a body of a known size, of limit at most: one allocation, and cut off
// is an error. If the size is not known it reads until there is more than the limit.
func readAll(r io.Reader, size, limit int64) ([]byte, error) {
	if size < 0 {
		return io.ReadAll(io.LimitReader(r, limit+1))
	}
	data := make([]byte, size)
	if _, err := io.ReadFull(r, data); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	// Reading to the end lets the connection be used again.
	_, err := io.Copy(io.Discard, io.LimitReader(r, 1))
	return data, err
}

// GetRange implements Store.
func (s *s3) GetRange(ctx context.Context, key string, offset, n int64) ([]byte, error) {
	if err := checkKey(OpGetRange, key); err != nil {
		return nil, err
	}
	if offset < 0 || n <= 0 {
		// HTTP has no empty ranges.
		o, err := s.Stat(ctx, key)
		if err != nil {
			return nil, err
		}
		return nil, checkRange(key, offset, n, o.Size)
	}
	var data []byte
	var short error
	err := s.do(ctx, OpGetRange, key, true, func(c *client, _ *bool) error {
		var opts minio.GetObjectOptions
		if err := opts.SetRange(offset, offset+n-1); err != nil {
			return err
		}
		body, info, header, err := c.GetObject(ctx, s.cfg.Bucket, key, opts)
		if err != nil {
			if code(err) == "InvalidRange" {
				short = fmt.Errorf("object %s is cut off: it ends before %d: %w", key, offset, io.ErrUnexpectedEOF)
				return nil
			}
			return err
		}
		defer body.Close()
		switch {
		case header.Get("Content-Range") == "" && (offset != 0 || info.Size > n):
			return minio.ErrorResponse{Code: minio.NotImplemented, Message: "it ignores ranges"}
		case info.Size < n:
			short = shortError(key, offset, n, offset+info.Size)
			return nil
		}
		data, err = readAll(body, n, n)
		return err
	})
	if err == nil {
		err = short
	}
	if err != nil {
		return nil, err
	}
	return data, nil
}

// Stat implements Store.
func (s *s3) Stat(ctx context.Context, key string) (Object, error) {
	if err := checkKey(OpStat, key); err != nil {
		return Object{}, err
	}
	var o Object
	err := s.do(ctx, OpStat, key, true, func(c *client, _ *bool) error {
		info, err := c.StatObject(ctx, s.cfg.Bucket, key, minio.StatObjectOptions{})
		o = object(info)
		o.Key = key
		return err
	})
	if err != nil {
		return Object{}, err
	}
	return o, nil
}

func object(i minio.ObjectInfo) Object {
	return Object{Key: i.Key, Size: i.Size, ETag: i.ETag, LastModified: i.LastModified}
}

// Put implements Store.
func (s *s3) Put(ctx context.Context, key string, data []byte, o PutOptions) (Object, error) {
	if err := checkKey(OpPut, key); err != nil {
		return Object{}, err
	}
	if err := o.check(key); err != nil {
		return Object{}, err
	}
	if len(data) > MaxObject {
		return Object{}, tooLarge(key, int64(len(data)), MaxObject)
	}
	conditional := o.IfNoneMatch || o.IfMatch != ""
	// The hash is signed: what was damaged on its way is refused.
	sum := sha256.Sum256(data)
	hash := hex.EncodeToString(sum[:])
	var put Object
	err := s.do(ctx, OpPut, key, !conditional, func(c *client, _ *bool) error {
		opts := minio.PutObjectOptions{ContentType: o.ContentType, DisableContentSha256: true}
		switch {
		case o.IfNoneMatch:
			opts.SetMatchETagExcept("*")
		case o.IfMatch != "":
			opts.SetMatchETag(o.IfMatch)
		}
		info, err := c.PutObject(ctx, s.cfg.Bucket, key, bytes.NewReader(data), int64(len(data)), "", hash, opts)
		if err != nil && o.IfMatch != "" && code(err) == minio.NoSuchKey {
			return minio.ErrorResponse{StatusCode: http.StatusPreconditionFailed, Code: minio.PreconditionFailed, Message: "it is gone"}
		}
		put = Object{Key: key, Size: int64(len(data)), ETag: info.ETag, LastModified: info.LastModified}
		return err
	})
	if err != nil {
		return Object{}, err
	}
	return put, nil
}

// List implements Store.
func (s *s3) List(ctx context.Context, prefix, delimiter, after string) iter.Seq2[Object, error] {
	return func(yield func(Object, error) bool) {
		if err := checkDelimiter(delimiter); err != nil {
			yield(Object{}, err)
			return
		}
		if delimiter != "" {
			s.listFolded(ctx, prefix, after, yield)
			return
		}
		stopped := false
		last := after
		err := s.do(ctx, OpList, prefix, true, func(c *client, progress *bool) error {
			for o, err := range s.pages(ctx, c, prefix, true, last) {
				if err != nil {
					return err
				}
				if o.Key <= last && last != "" {
					continue
				}
				last = o.Key
				*progress = true
				if stopped = !yield(o, nil); stopped {
					return nil
				}
			}
			return ctx.Err()
		})
		if err != nil && !stopped {
			yield(Object{}, err)
		}
	}
}

// listFolded has the whole list before it yields the first: S3 gives objects and
// folders of a page apart, and folded lists are short.
func (s *s3) listFolded(ctx context.Context, prefix, after string, yield func(Object, error) bool) {
	var list []Object
	err := s.do(ctx, OpList, prefix, true, func(c *client, _ *bool) error {
		list = list[:0]
		for o, err := range s.pages(ctx, c, prefix, false, after) {
			if err != nil {
				return err
			}
			if o.Key > after {
				list = append(list, o)
			}
		}
		return ctx.Err()
	})
	if err != nil {
		yield(Object{}, err)
		return
	}
	slices.SortFunc(list, func(a, b Object) int { return strings.Compare(a.Key, b.Key) })
	list = slices.CompactFunc(list, func(a, b Object) bool { return a.Key == b.Key })
	for _, o := range list {
		if !yield(o, nil) {
			return
		}
	}
}

func (s *s3) pages(ctx context.Context, c *client, prefix string, recursive bool, after string) iter.Seq2[Object, error] {
	owner := false
	return func(yield func(Object, error) bool) {
		for i := range c.Client.ListObjectsIter(ctx, s.cfg.Bucket, minio.ListObjectsOptions{
			Prefix: prefix, Recursive: recursive, StartAfter: after, FetchOwner: &owner,
		}) {
			o := object(i)
			if !recursive && strings.HasSuffix(o.Key, "/") && o.Key != prefix {
				o = Object{Key: o.Key, Prefix: true}
			}
			if !yield(o, i.Err) {
				return
			}
		}
	}
}

// Delete implements Store.
func (s *s3) Delete(ctx context.Context, keys ...string) error {
	for batch := range slices.Chunk(keys, deleteBatch) {
		if err := s.deleteBatch(ctx, batch); err != nil {
			return err
		}
	}
	return nil
}

func (s *s3) deleteBatch(ctx context.Context, keys []string) error {
	if len(keys) == 1 {
		return s.deleteOne(ctx, keys[0])
	}
	err := s.do(ctx, OpDelete, fmt.Sprintf("%s and %d more", keys[0], len(keys)-1), true, func(c *client, _ *bool) error {
		results, err := c.RemoveObjectsWithIter(ctx, s.cfg.Bucket, func(yield func(minio.ObjectInfo) bool) {
			for _, k := range keys {
				if !yield(minio.ObjectInfo{Key: k}) {
					return
				}
			}
		}, minio.RemoveObjectsOptions{})
		if err != nil {
			return err
		}
		for r := range results {
			if r.Err != nil && code(r.Err) != minio.NoSuchKey {
				return r.Err
			}
		}
		return ctx.Err()
	})
	if !errors.Is(err, ErrUnsupported) {
		return err
	}
	// Not every S3 server can delete many at once.
	for _, k := range keys {
		if err := s.deleteOne(ctx, k); err != nil {
			return err
		}
	}
	return nil
}

func (s *s3) deleteOne(ctx context.Context, key string) error {
	if err := checkKey(OpDelete, key); err != nil {
		return err
	}
	return s.do(ctx, OpDelete, key, true, func(c *client, _ *bool) error {
		err := c.RemoveObject(ctx, s.cfg.Bucket, key, minio.RemoveObjectOptions{})
		if code(err) == minio.NoSuchKey {
			return nil
		}
		return err
	})
}

// Region is the region that requests are signed for. The store is asked for it only
// if it is auto, and that is not the region's own name there.
func Region(ctx context.Context, c Config) (string, error) {
	s, err := open(c)
	if err != nil {
		return "", err
	}
	defer s.Close()
	if !s.auto {
		cl, err := s.connect(ctx)
		if err != nil {
			return "", err
		}
		return cl.region, nil
	}
	// A listing finds out, also where the store does not tell its region when asked.
	for _, err := range s.List(ctx, "", "", "") {
		if err != nil {
			return "", err
		}
		break
	}
	cl, err := s.connect(ctx)
	if err != nil {
		return "", err
	}
	return cl.region, nil
}
