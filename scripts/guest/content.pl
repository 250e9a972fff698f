# Writes the file set of the measured program: perl content.pl TARGET_DIR REQUEST_LIST
# 320 files of 2 to 400 KiB (about 30 MiB), sizes spread evenly over their logarithm as those of web sites are, the
# same bytes in every build. The request list names them in an order that is not the order on the disk.
use strict;
use warnings;
no warnings 'portable';

my ( $target, $list ) = @ARGV;
my $state = 88172645463325252;    # Marsaglia's xorshift64: perl's own rand differs between versions
sub next_random {
    $state ^= ( $state << 13 ) & 0xFFFFFFFFFFFFFFFF;
    $state ^= $state >> 7;
    $state ^= ( $state << 17 ) & 0xFFFFFFFFFFFFFFFF;
    return $state;
}

my $pool = pack( 'Q*', map { next_random() } 1 .. 131072 );    # 1 MiB
my @files;
for my $index ( 0 .. 319 ) {
    my $folder = sprintf( '%s/%02d', $target, $index % 16 );
    mkdir $folder;
    my $bytes = int( 2048 * 2**( ( next_random() % 7650 ) / 1000 ) );
    my $path  = sprintf( '%s/%04d.bin', $folder, $index );
    open( my $file, '>:raw', $path ) or die "$path: $!\n";
    print {$file} pack( 'QQ', $index, $bytes ), substr( $pool, next_random() % 500_000, $bytes - 16 ) or die "$path: $!\n";
    close($file) or die "$path: $!\n";
    push @files, sprintf( '/srv/www/%02d/%04d.bin', $index % 16, $index );
}
my %order = map { $_ => next_random() } @files;
open( my $out, '>', $list ) or die "$list: $!\n";
print {$out} "$_\n" for sort { $order{$a} <=> $order{$b} } @files;
close($out) or die "$list: $!\n";
