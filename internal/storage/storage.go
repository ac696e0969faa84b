// Package storage says where sessions are kept: which object store, with which
// keys, and which folder of it is whose.
//
// Everything of one Config lies below its Root in the bucket:
//
//	<root>/<prefix>/…               a session's folder; what a mount shows
//	<root>/.cloudcode/v1/…          checkpoints of all sessions; see package checkpoint
//	<root>/.cloudcode/probe/…       what Check writes, and removes
//
// A session cannot see .cloudcode: its folder is beside it, or, where its prefix is
// empty, the node hides it.
package storage

import (
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strconv"
	"strings"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

// ErrInvalid is the class of what is wrong with a configuration as it is written;
// what an object store has to say against it has objstore's classes.
var ErrInvalid = errors.New("object storage is not configured right")

// Config is one object store and the keys to it. Secrets are in it: it prints and
// logs without them, but its JSON has them.
type Config struct {
	Endpoint        string `json:"endpoint"` // https://host[:port], no path
	Bucket          string `json:"bucket"`
	AccessKeyID     string `json:"access_key_id"`
	SecretAccessKey string `json:"secret_access_key"`
	Region          string `json:"region,omitempty"` // empty: auto
	PathStyle       bool   `json:"path_style,omitempty"`
	Root            string `json:"prefix,omitempty"` // no slash at its ends; may be empty
	TigrisFSArgs    string `json:"tigrisfs_args,omitempty"`
	// EncryptionKey of checkpoints: 32 bytes, or nil for none.
	EncryptionKey []byte `json:"encryption_key,omitempty"`

	// Own: a user named it, so that it may lead anywhere. What answers there without
	// being an S3 server is not told, and with PublicOnly nothing but the public
	// internet is connected to.
	Own        bool `json:"-"`
	PublicOnly bool `json:"-"`
}

// OwnPolicy says what object storage of their own sessions may bring.
type OwnPolicy string

// The policies. The zero value is OwnPublic.
const (
	OwnDeny   OwnPolicy = "deny"   // none
	OwnPublic OwnPolicy = "public" // at addresses of the public internet
	OwnAny    OwnPolicy = "any"    // all that server and nodes can reach
)

// ParseOwnPolicy returns ErrInvalid for what is none.
func ParseOwnPolicy(s string) (OwnPolicy, error) {
	switch p := OwnPolicy(s); p {
	case OwnDeny, OwnPublic, OwnAny:
		return p, nil
	case "":
		return OwnPublic, nil
	}
	return "", fmt.Errorf("%w: %q: it must be %s, %s or %s", ErrInvalid, s, OwnDeny, OwnPublic, OwnAny)
}

const (
	// StateDir is the folder below Root that holds what Cloud Code itself keeps.
	StateDir = ".cloudcode"
	// RegionAuto is the region that asks the object store for its region.
	RegionAuto = "auto"
	// EncryptionKeySize in bytes.
	EncryptionKeySize = 32
)

// Names of the environment's variables, those of the original project but for the last.
const (
	EnvEndpoint        = "S3_ENDPOINT"
	EnvBucket          = "S3_BUCKET"
	EnvAccessKeyID     = "S3_ACCESS_KEY_ID"
	EnvSecretAccessKey = "S3_SECRET_ACCESS_KEY"
	EnvRegion          = "S3_REGION"
	EnvPathStyle       = "S3_PATH_STYLE"
	EnvPrefix          = "S3_PREFIX"
	EnvTigrisFSArgs    = "TIGRISFS_ARGS"
	EnvEncryptionKey   = "CLOUDCODE_ENCRYPTION_KEY"
)

// FromEnv reads a Config from environment variables. It returns nil if none is
// set, which is local mode, and ErrInvalid with the names of what is missing if some are.
func FromEnv(getenv func(string) string) (*Config, error) {
	c := &Config{
		Endpoint:        strings.TrimSpace(getenv(EnvEndpoint)),
		Bucket:          strings.TrimSpace(getenv(EnvBucket)),
		AccessKeyID:     strings.TrimSpace(getenv(EnvAccessKeyID)),
		SecretAccessKey: strings.TrimSpace(getenv(EnvSecretAccessKey)),
		Region:          strings.TrimSpace(getenv(EnvRegion)),
		Root:            strings.Trim(strings.TrimSpace(getenv(EnvPrefix)), "/"),
		TigrisFSArgs:    strings.TrimSpace(getenv(EnvTigrisFSArgs)),
	}
	required := []struct{ name, value string }{
		{EnvEndpoint, c.Endpoint},
		{EnvBucket, c.Bucket},
		{EnvAccessKeyID, c.AccessKeyID},
		{EnvSecretAccessKey, c.SecretAccessKey},
	}
	var set, missing []string
	for _, r := range required {
		if r.value == "" {
			missing = append(missing, r.name)
		} else {
			set = append(set, r.name)
		}
	}
	// These mean something only beside the others: alone they are a mistake too.
	for _, name := range []string{EnvRegion, EnvPathStyle, EnvPrefix, EnvTigrisFSArgs} {
		if strings.TrimSpace(getenv(name)) != "" {
			set = append(set, name)
		}
	}
	// The key alone is none: it may be meant for the profiles of a file.
	key, err := ParseEncryptionKey(getenv(EnvEncryptionKey))
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrInvalid, EnvEncryptionKey, err)
	}
	c.EncryptionKey = key
	switch {
	case len(set) == 0:
		return nil, nil
	case len(missing) > 0:
		return nil, fmt.Errorf("%w: %s is set, but not %s: set it, or none of them to keep sessions on local disks alone",
			ErrInvalid, words(set), words(missing))
	}
	if v := strings.TrimSpace(getenv(EnvPathStyle)); v != "" {
		c.PathStyle, err = strconv.ParseBool(strings.ToLower(v))
		if err != nil {
			return nil, fmt.Errorf("%w: %s is %q: it must be true or false", ErrInvalid, EnvPathStyle, v)
		}
	}
	names := fieldNames{EnvEndpoint, EnvBucket, EnvAccessKeyID, EnvSecretAccessKey, EnvRegion, EnvPrefix, EnvTigrisFSArgs, EnvEncryptionKey}
	if err := c.validate(names); err != nil {
		return nil, err
	}
	return c, nil
}

// ParseEncryptionKey reads base64 of 32 bytes; the empty text is no key.
func ParseEncryptionKey(s string) ([]byte, error) {
	s = strings.TrimSpace(s)
	if s == "" {
		return nil, nil
	}
	key, err := base64.StdEncoding.DecodeString(s)
	if err != nil || len(key) != EncryptionKeySize {
		// Without its value, which is a secret, nearly right or not.
		return nil, fmt.Errorf("it must be base64 of %d bytes; make one with: openssl rand -base64 %d, and keep a copy: without it nothing can be restored",
			EncryptionKeySize, EncryptionKeySize)
	}
	return key, nil
}

// fieldNames are the names by which the one who wrote a Config knows its fields.
type fieldNames struct {
	endpoint, bucket, accessKeyID, secretAccessKey, region, prefix, tigrisFSArgs, encryptionKey string
}

// jsonNames are those of profiles and of the API.
var jsonNames = fieldNames{
	"endpoint", "bucket", "access_key_id", "secret_access_key", "region", "prefix", "tigrisfs_args", "encryption_key",
}

// Validate returns ErrInvalid with all that is missing or cannot be right, by the
// names that JSON and the API have for it.
func (c Config) Validate() error { return c.validate(jsonNames) }

func (c Config) validate(names fieldNames) error {
	var missing []string
	for _, r := range []struct{ name, value string }{
		{names.endpoint, c.Endpoint},
		{names.bucket, c.Bucket},
		{names.accessKeyID, c.AccessKeyID},
		{names.secretAccessKey, c.SecretAccessKey},
	} {
		if r.value == "" {
			missing = append(missing, r.name)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%w: missing %s", ErrInvalid, words(missing))
	}
	bad := func(name string, err error) error { return fmt.Errorf("%w: %s: %w", ErrInvalid, name, err) }
	if err := validateEndpoint(c.Endpoint); err != nil {
		return bad(names.endpoint, err)
	}
	if err := validateBucket(c.Bucket); err != nil {
		return bad(names.bucket, err)
	}
	for _, r := range []struct{ name, value string }{
		{names.accessKeyID, c.AccessKeyID},
		{names.secretAccessKey, c.SecretAccessKey},
		{names.region, c.Region},
	} {
		if strings.ContainsFunc(r.value, func(c rune) bool { return c <= ' ' || c > '~' }) {
			return bad(r.name, errors.New("it has a space, line end or other character that does not belong there"))
		}
	}
	if err := ValidateRoot(c.Root); err != nil {
		return bad(names.prefix, err)
	}
	if strings.ContainsAny(c.TigrisFSArgs, "\x00\n\r") {
		return bad(names.tigrisFSArgs, errors.New("it must be one line"))
	}
	if n := len(c.EncryptionKey); n != 0 && n != EncryptionKeySize {
		return bad(names.encryptionKey, fmt.Errorf("it must be %d bytes, not %d", EncryptionKeySize, n))
	}
	return nil
}

func validateEndpoint(s string) error {
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return fmt.Errorf("%q is no URL; it looks like https://fly.storage.tigris.dev", s)
	case u.Scheme != "http" && u.Scheme != "https":
		return fmt.Errorf("%q must begin with https:// (or http://)", s)
	case u.Hostname() == "":
		return fmt.Errorf("%q has no host name", s)
	case u.User != nil:
		return errors.New("keys do not belong into the URL")
	case strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "":
		return fmt.Errorf("%q must be the address of the server alone, without what follows the host: the bucket has a setting of its own", s)
	}
	if p := u.Port(); p != "" {
		if n, err := strconv.Atoi(p); err != nil || n < 1 || n > 65535 {
			return fmt.Errorf("%q has a port that cannot be", s)
		}
	}
	return nil
}

// validateBucket is lenient: servers other than AWS's take more than AWS does.
func validateBucket(s string) error {
	ok := len(s) >= 3 && len(s) <= 63 && !strings.Contains(s, "..")
	for i, c := range []byte(s) {
		alnum := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		ok = ok && (alnum || (c == '-' || c == '.') && i > 0 && i < len(s)-1)
	}
	if !ok {
		return fmt.Errorf("%q is no bucket name: 3 to 63 lower-case letters, digits, dots and hyphens", s)
	}
	return nil
}

// ObjStore is what objstore.Open takes.
func (c Config) ObjStore() objstore.Config {
	return objstore.Config{
		Endpoint: c.Endpoint, Bucket: c.Bucket, AccessKeyID: c.AccessKeyID, SecretAccessKey: c.SecretAccessKey,
		Region: c.Region, PathStyle: c.PathStyle, Quiet: c.Own, PublicOnly: c.PublicOnly,
	}
}

// UsesPathStyle says whether requests must have the bucket in their path: where it is
// asked for, and where a host name cannot have it. Mounters need it as well.
func (c Config) UsesPathStyle() bool { return c.ObjStore().UsesPathStyle() }

// Open returns the objects below Root, by keys relative to it. Nothing is asked of
// the object store yet. Give what it returns to objstore.Close.
func Open(c Config) (objstore.Store, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	s, err := objstore.Open(c.ObjStore())
	if err != nil {
		return nil, err
	}
	if c.Root == "" {
		return s, nil
	}
	return objstore.WithPrefix(s, c.Root+"/"), nil
}

// URI names a session's folder for people.
func (c Config) URI(prefix string) string {
	return "s3://" + Join(c.Bucket, Join(c.Root, prefix))
}

// String tells which object store it is, without secrets.
func (c Config) String() string {
	return c.URI("") + " at " + c.Endpoint
}

// GoString is for %#v: secrets stay out of that as well.
func (c Config) GoString() string { return "storage.Config{" + c.String() + "}" }

// LogValue shows all but secrets.
func (c Config) LogValue() slog.Value {
	return slog.GroupValue(
		slog.String("endpoint", c.Endpoint),
		slog.String("bucket", c.Bucket),
		slog.String("access_key_id", c.AccessKeyID),
		slog.String("region", c.Region),
		slog.Bool("path_style", c.PathStyle),
		slog.String("prefix", c.Root),
		slog.String("tigrisfs_args", c.TigrisFSArgs),
		slog.Bool("encrypted", len(c.EncryptionKey) > 0),
	)
}

// words lists names as a sentence has them.
func words(names []string) string {
	if len(names) < 2 {
		return strings.Join(names, "")
	}
	return strings.Join(names[:len(names)-1], ", ") + " and " + names[len(names)-1]
}
